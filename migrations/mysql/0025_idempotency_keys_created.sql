-- retention: the oldest keys first
-- MySQL knows no CREATE INDEX IF NOT EXISTS: a step may be repeated, so what is there is looked up first.
SET @step = IF(
    (SELECT COUNT(*) FROM information_schema.statistics
     WHERE table_schema = DATABASE() AND table_name = 'idempotency_keys' AND index_name = 'idempotency_keys_created') = 0,
    'CREATE INDEX idempotency_keys_created ON idempotency_keys (created_at)',
    'DO 0'
);
PREPARE step FROM @step;
EXECUTE step;
DEALLOCATE PREPARE step;
