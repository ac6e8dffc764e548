"""What the commands that look at data are made of: check, stats, peek, ledger."""
