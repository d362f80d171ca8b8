"""The page of a report: `document` puts it together, a module for each of its parts has pictures and words of it."""
