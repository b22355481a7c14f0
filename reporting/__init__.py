"""Reports on runs: history, charts, pictures and the HTML page, and the listeners that follow a run as it trains."""
