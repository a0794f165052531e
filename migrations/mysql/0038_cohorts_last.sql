-- The id of the notification that is last in it: all of them lie between the two, and are found by the primary key. NULL:
-- accepted by a version that did not write it.
-- MySQL knows no ADD COLUMN IF NOT EXISTS: a step may be repeated, so what is there is looked up first.
SET @step = IF(
    (SELECT COUNT(*) FROM information_schema.columns
     WHERE table_schema = DATABASE() AND table_name = 'cohorts' AND column_name = 'last') = 0,
    'ALTER TABLE cohorts ADD COLUMN last BINARY(16) NULL',
    'DO 0'
);
PREPARE step FROM @step;
EXECUTE step;
DEALLOCATE PREPARE step;
