"""One function for each way to make up a folder; pytest runs them for seconds, `make fuzz` for minutes."""

from collections.abc import Callable, Mapping

from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.material import HEALTHY, SINGLE, TASK, damaged_files, headers, image, label, nifti, trees
from tests.fuzz.properties import FORMS, Entry, command_holds, holds

_TABLE = b"id,T1,label\na,image,label\n"
_IMAGE, _LABEL = nifti(image(0)), nifti(label())


@given(file=headers(), is_label=st.booleans())
def drawn_headers(file: bytes, is_label: bool) -> None:
    """A case with drawn fields in the header of its image or label."""
    _check_pair(file, is_label)


@given(file=damaged_files(), is_label=st.booleans())
def changed_bytes(file: bytes, is_label: bool) -> None:
    """A case whose image or label was damaged, before or after it was compressed."""
    _check_pair(file, is_label)


@given(data=st.data(), layout=st.sampled_from(sorted(HEALTHY)), is_detected=st.booleans())
def drawn_trees(data: st.DataObject, layout: str, is_detected: bool) -> None:
    """A folder of any layout with drawn names, links, pipes and lists."""
    tree: dict[str, Entry] = data.draw(trees(layout))
    holds(tree, TASK, None if is_detected else layout.replace("tsv", "csv"))


@given(data=st.data(), layout=st.sampled_from(sorted(HEALTHY)), form=st.sampled_from(FORMS))
def commands(data: st.DataObject, layout: str, form: str) -> None:
    """`fedqc check` itself on such folders, in each of its forms."""
    command_holds(data.draw(trees(layout)), TASK, form=form)


TARGETS: Mapping[str, Callable[[], None]] = {
    "headers": drawn_headers,
    "bytes": changed_bytes,
    "trees": drawn_trees,
    "commands": commands,
}


def _check_pair(file: bytes, is_label: bool) -> None:
    pair = {"image": _IMAGE, "label": file} if is_label else {"image": file, "label": _LABEL}
    holds({"cases.csv": _TABLE, **pair}, SINGLE)
