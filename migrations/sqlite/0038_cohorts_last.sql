-- The id of the notification that is last in it: all of them lie between the two, and are found by the primary key. NULL:
-- accepted by a version that did not write it.
ALTER TABLE cohorts ADD COLUMN last BLOB NULL;
