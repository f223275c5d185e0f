"""Where the texts of tasks come from: one file for each data set or reader."""
