"""The report of a run: what its log tells, charts, pictures, the page; and what follows a run while it goes on."""
