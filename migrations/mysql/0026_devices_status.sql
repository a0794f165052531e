-- retention: devices that are not active, in the order of their numbers, which an index has behind its columns
-- MySQL knows no CREATE INDEX IF NOT EXISTS: a step may be repeated, so what is there is looked up first.
SET @step = IF(
    (SELECT COUNT(*) FROM information_schema.statistics
     WHERE table_schema = DATABASE() AND table_name = 'devices' AND index_name = 'devices_status') = 0,
    'CREATE INDEX devices_status ON devices (status)',
    'DO 0'
);
PREPARE step FROM @step;
EXECUTE step;
DEALLOCATE PREPARE step;
