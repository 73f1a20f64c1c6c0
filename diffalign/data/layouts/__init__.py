"""What the columns of a data set mean, one layout per file; see ``diffalign.data.table.Layout``."""
