"""Labels of known quality that come from trained segmenters, made once and stored."""
