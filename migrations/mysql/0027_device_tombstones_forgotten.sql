-- retention: the oldest tombstones first
-- MySQL knows no CREATE INDEX IF NOT EXISTS: a step may be repeated, so what is there is looked up first.
SET @step = IF(
    (SELECT COUNT(*) FROM information_schema.statistics
     WHERE table_schema = DATABASE() AND table_name = 'device_tombstones' AND index_name = 'device_tombstones_forgotten') = 0,
    'CREATE INDEX device_tombstones_forgotten ON device_tombstones (forgotten_at)',
    'DO 0'
);
PREPARE step FROM @step;
EXECUTE step;
DEALLOCATE PREPARE step;
