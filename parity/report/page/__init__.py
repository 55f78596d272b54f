"""The report as a page: HTML without scripts or fonts from elsewhere, and its charts."""
