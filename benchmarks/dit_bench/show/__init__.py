"""How reports are shown: tables, Markdown, figures and pages."""
