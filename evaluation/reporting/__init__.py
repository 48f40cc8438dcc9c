"""What every report is made of: HTML, Markdown, figures; and the report of a run, from its files."""
