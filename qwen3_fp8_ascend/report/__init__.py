"""The verification report, written from the result files of real runs: `results` reads them, `pages` writes."""
