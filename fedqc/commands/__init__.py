"""The commands that need no role: a site's own machine, no network. `fedqc.cli` puts them together."""
