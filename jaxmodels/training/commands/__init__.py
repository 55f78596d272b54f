"""Commands on training runs, subcommands of `jaxmodels`: evaluate, sample, plot; and new, which writes a template."""
