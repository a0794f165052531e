-- Where its one chunk is kept, if it was accepted together with others.
-- MySQL knows no ADD COLUMN IF NOT EXISTS: a step may be repeated, so what is there is looked up first.
SET @step = IF(
    (SELECT COUNT(*) FROM information_schema.columns
     WHERE table_schema = DATABASE() AND table_name = 'notifications' AND column_name = 'cohort') = 0,
    'ALTER TABLE notifications ADD COLUMN cohort BINARY(16) NULL, ADD COLUMN seat INT NULL, ADD KEY notifications_cohort (cohort)',
    'DO 0'
);
PREPARE step FROM @step;
EXECUTE step;
DEALLOCATE PREPARE step;
