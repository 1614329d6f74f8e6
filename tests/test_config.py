from collections.abc import Callable
from pathlib import Path

import pytest

from fedqc.config import (
    CoordinatorConfig,
    FederationConfig,
    SiteConfig,
    field_of,
    load_federation,
    load_site,
    parse_value,
)
from fedqc.errors import ConfigError

SITE = 'name = "hospital-a"\ntask = "msd-hippocampus"\n[data]\npath = "scans"\n'
FEDERATION = 'task = "msd-hippocampus"\n'

Load = Callable[[str], SiteConfig | FederationConfig]


@pytest.fixture
def site(tmp_path: Path) -> Callable[[str], SiteConfig]:
    def load(text: str) -> SiteConfig:
        path = tmp_path / "site.toml"
        path.write_text(text)
        return load_site(path)

    return load


@pytest.fixture
def federation(tmp_path: Path) -> Callable[[str], FederationConfig]:
    def load(text: str) -> FederationConfig:
        path = tmp_path / "federation.toml"
        path.write_text(text)
        return load_federation(path)

    return load


def refusal(load: Load, text: str) -> str:
    """The message without the path of the file, which every message starts with."""
    with pytest.raises(ConfigError) as caught:
        load(text)
    path, _, message = str(caught.value).partition(".toml: ")
    assert Path(path).name in {"site", "federation"}
    assert "\n" not in message
    return message


def test_shortest_site_file_has_the_defaults(site: Callable[[str], SiteConfig]) -> None:
    config = site(SITE)
    assert config.name == "hospital-a"
    assert config.policy.min_count == 10
    assert config.compute.device == "auto"


def test_paths_of_a_site_are_seen_from_its_file(site: Callable[[str], SiteConfig], tmp_path: Path) -> None:
    config = site(SITE + 'reference = "lists/verified.csv"\n[compute]\ncache = "/fast/cache"\n')
    assert config.data.path == tmp_path / "scans"
    assert config.data.reference == tmp_path / "lists" / "verified.csv"
    assert config.compute.cache == Path("/fast/cache")
    assert config.results == tmp_path / "results"
    assert config.task == "msd-hippocampus"


def test_lists_and_credentials_are_seen_from_the_file(
    site: Callable[[str], SiteConfig], tmp_path: Path
) -> None:
    config = site(
        SITE + 'ratings = "../ratings.tsv"\n'
        '[coordinator]\naddress = "fl.example.org:443"\nca = "ca.crt"\nkey = "/keys/hospital-a.key"\n'
    )
    assert config.data.ratings == tmp_path.parent / "ratings.tsv"
    assert config.coordinator == CoordinatorConfig(
        address="fl.example.org:443", ca=tmp_path / "ca.crt", key=Path("/keys/hospital-a.key")
    )


def test_lists_and_credentials_may_be_left_out(site: Callable[[str], SiteConfig]) -> None:
    config = site(SITE + "[coordinator]\n")
    assert (config.data.reference, config.data.ratings) == (None, None)
    assert config.coordinator == site(SITE).coordinator == CoordinatorConfig()


@pytest.mark.parametrize(
    "address", ["fl.example.org:443", "127.0.0.1:1", "a:65535", "FL-1.example.org:9092", "[::1]:443"]
)
def test_addresses(site: Callable[[str], SiteConfig], address: str) -> None:
    assert site(SITE + f'[coordinator]\naddress = "{address}"\n').coordinator.address == address


@pytest.mark.parametrize(
    "address",
    [
        "fl.example.org",
        "fl.example.org:",
        "fl.example.org:0",
        "fl.example.org:65536",
        "fl.example.org:99999999999999999999",
        "fl.example.org:https",
        "fl.example.org:-1",
        "fl.example.org: 443",
        "https://fl.example.org:443",
        "fl.example.org:443/run",
        ":443",
        "-a.org:443",
        "::1:443",
        "two words:443",
        "fl.example.org:\u0664\u0664\u0663",  # digits, but not those of a port
        "",
    ],
)
def test_what_is_no_address(site: Callable[[str], SiteConfig], address: str) -> None:
    message = refusal(site, SITE + f'[coordinator]\naddress = "{address}"\n')
    assert message == (
        "coordinator.address: an address is a host and a port from 1 to 65535, such as "
        f"'fl.example.org:443', and no more (found {address!r})"
    )


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CUDA", "cpu:0", ""])
def test_what_is_no_device(site: Callable[[str], SiteConfig], device: str) -> None:
    message = refusal(site, SITE + f'[compute]\ndevice = "{device}"\n')
    assert message == (
        "compute.device: a device is 'auto', 'cpu', 'cuda' or one GPU of several, such as 'cuda:1' "
        f"(found {device!r})"
    )


@pytest.mark.parametrize("name", ["a b", "", "-a", "x" * 64, "a/b", "ä"])
def test_names_of_federations_are_fit_for_files(
    federation: Callable[[str], FederationConfig], name: str
) -> None:
    message = refusal(federation, FEDERATION + f'name = "{name}"\n')
    assert message.startswith("name: a federation's name is up to 63 letters, digits, dots")


@pytest.mark.parametrize(
    ("path", "sentence"),
    [("~nobody-of-this-name/x", "there is no such user"), ("a\\u0000b", "no file can have this name")],
)
def test_paths_that_lead_nowhere(site: Callable[[str], SiteConfig], path: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        site(SITE.replace("scans", path))


def test_home_folder_is_understood(
    site: Callable[[str], SiteConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert site(SITE.replace("scans", "~/scans")).data.path == tmp_path / "home" / "scans"


def test_paths_of_a_federation_are_seen_from_its_file(
    federation: Callable[[str], FederationConfig], tmp_path: Path
) -> None:
    config = federation('task = "tasks/liver.toml"\n[qc]\ninitial = "models/qc"\n')
    assert config.task == str(tmp_path / "tasks" / "liver.toml")
    assert config.qc.initial == tmp_path / "models" / "qc"
    assert federation(FEDERATION).qc.initial is None


def test_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "federation.toml"
    path.write_text(FEDERATION, encoding="utf-8-sig")
    assert load_federation(path).task == "msd-hippocampus"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [('"90s"', 90), ('"30m"', 1800), ('"1.5h"', 5400), ('"2 d"', 172800), ("45", 45), ("0.5", 0.5)],
)
def test_durations(federation: Callable[[str], FederationConfig], text: str, seconds: float) -> None:
    assert federation(FEDERATION + f"[sites]\nwait = {text}\n").sites.wait == seconds


@pytest.mark.parametrize("text", ['"soon"', '"30"', '"5 weeks"', '"-2h"', '""'])
def test_what_is_no_duration(federation: Callable[[str], FederationConfig], text: str) -> None:
    message = refusal(federation, FEDERATION + f"[qc]\ndeadline = {text}\n")
    assert message == (
        "qc.deadline: a duration is a number and a unit, such as '90s', '30m', '2h' or '1d' "
        f"(found {text.replace(chr(34), chr(39))})"
    )


@pytest.mark.parametrize(
    ("value", "allowed"), [('"0s"', "greater than 0"), ("inf", "finite"), ("-1", "greater than 0")]
)
def test_durations_are_positive_and_end(
    federation: Callable[[str], FederationConfig], value: str, allowed: str
) -> None:
    message = refusal(federation, FEDERATION + f"[sites]\nwait = {value}\n")
    assert message.startswith("sites.wait: ")
    assert allowed in message


def test_unknown_key_names_the_nearest_known_one(federation: Callable[[str], FederationConfig]) -> None:
    message = refusal(federation, FEDERATION + "[qc.samples]\nseggan = 1\n")
    assert message == (
        "unknown key 'qc.samples.seggan'; did you mean 'seggen'? known here: annotator, forest, seggen, "
        "side_outputs, snapshots, untouched"
    )


def test_unknown_key_far_from_any_known_one(site: Callable[[str], SiteConfig]) -> None:
    message = refusal(site, SITE + "[policy]\nxyz = 1\n")
    assert (
        message == "unknown key 'policy.xyz'; "
        "known here: hours, largest_model, min_count, refuse, segmentation, sheet"
    )


def test_missing_keys_are_all_named(site: Callable[[str], SiteConfig]) -> None:
    message = refusal(site, 'name = "a"\n[data]\n')
    assert message == "key 'task' is missing; key 'data.path' is missing"


def test_broken_toml_names_the_line(site: Callable[[str], SiteConfig]) -> None:
    message = refusal(site, 'name = "a"\ntask = \n')
    assert message.startswith("not valid TOML: ")
    assert "line 2" in message


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: there is no such file$"):
        load_site(tmp_path / "nowhere.toml")


def test_folder_or_binary_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_site(tmp_path)
    (tmp_path / "site.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"site\.toml: it cannot be read"):
        load_site(tmp_path / "site.toml")


def test_site_twice(federation: Callable[[str], FederationConfig]) -> None:
    message = refusal(federation, FEDERATION + '[sites]\nexpected = ["a", "b", "a"]\n')
    assert message == "sites: site named twice: a; every site has a name of its own"


@pytest.mark.parametrize("name", ["Hospital A", "-a", "", "a/b", "a\\n", "x" * 64])
def test_site_names_are_fit_for_folders_and_hosts(site: Callable[[str], SiteConfig], name: str) -> None:
    message = refusal(site, SITE.replace("hospital-a", name))
    assert message.startswith("name: a site's name is up to 63 lower-case letters, digits and hyphens")


def test_value_instead_of_a_table(federation: Callable[[str], FederationConfig]) -> None:
    message = refusal(federation, FEDERATION + "[qc]\nsamples = 3\n")
    assert message == "qc.samples: must be a table, written [qc.samples] (found 3)"


def test_value_out_of_range_says_what_is_allowed(federation: Callable[[str], FederationConfig]) -> None:
    message = refusal(federation, FEDERATION + "[curation]\nthreshold = 1.5\n")
    assert message == "curation.threshold: input should be less than or equal to 1 (found 1.5)"


def test_all_shares_zero(federation: Callable[[str], FederationConfig]) -> None:
    message = refusal(federation, FEDERATION + "[qc.samples]\nseggen = 0\nannotator = 0\nuntouched = 0\n")
    assert message.startswith("qc.samples: all shares are 0")


def test_values_of_single_keys() -> None:
    assert parse_value("12", FederationConfig, "qc.rounds") == 12
    assert parse_value("1.5h", FederationConfig, "sites.wait") == 5400
    assert parse_value(["a", "b"], FederationConfig, "sites.expected") == ("a", "b")
    assert parse_value("no", SiteConfig, "policy.segmentation") is False
    with pytest.raises(ConfigError, match=r"^input should be greater than or equal to 1 \(found '0'\)$"):
        parse_value("0", FederationConfig, "qc.rounds")
    with pytest.raises(ConfigError, match=r"^a site's name is .* \(found 'B'\)$"):
        parse_value(["a", "B"], FederationConfig, "sites.expected")
    with pytest.raises(ConfigError, match=r"less than 1 \(found 1\.0\)"):
        parse_value(1.0, FederationConfig, "qc.network.dropout")


def test_keys_of_a_model() -> None:
    assert field_of(FederationConfig, "qc.samples.seggen").default == 0.3
    assert field_of(SiteConfig, "name").is_required()
    for key in ("qc.colour", "name.first", "colour"):
        with pytest.raises(KeyError):
            field_of(FederationConfig, key)
