-- Where its one chunk is kept, if it was accepted together with others: the cohort,
ALTER TABLE notifications ADD COLUMN cohort BLOB NULL;
