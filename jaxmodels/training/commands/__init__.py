"""Commands on training runs, subcommands of `jaxmodels`: evaluate, sample, plot."""
