"""Results as files, tables, figures and one page."""
