"""Programs that build and check the site: hooks of MkDocs, the generated reference, screenshots."""
