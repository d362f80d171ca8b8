"""The tests. Folders mirror the packages; `system/` starts real processes."""
