"""One module for each subcommand other than train."""
