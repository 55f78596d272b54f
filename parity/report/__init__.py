"""Reports: the table, the HTML page, JSON and JUnit."""
