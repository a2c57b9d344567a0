"""Reports: tables, pages and model cards from an evaluation."""
