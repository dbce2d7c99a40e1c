"""The report: one page on a suite, with the data of every plot."""
