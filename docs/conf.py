"""How Sphinx builds these pages (make docs). Neither the build nor the pages fetch anything."""

project = "Tokenplane"
copyright = "the Tokenplane authors, Apache-2.0"
extensions = ["myst_parser"]
exclude_patterns = ["reports", "hardware-runs"]
html_theme = "furo"
html_title = "Tokenplane"
html_show_sourcelink = False
myst_heading_anchors = 3
myst_links_external_new_tab = False
