-- Rows for exceptions only, so that SQL finds them: outcomes other than accepted (up to 10,000 a notification), and
-- apns-unique-id (up to 1,000 targets). The chunk's compact form is the truth.
CREATE TABLE IF NOT EXISTS delivery_notes (
    notification_id BINARY(16) NOT NULL,
    number INT NOT NULL,
    position INT NOT NULL,
    device_seq BIGINT NULL,
    status VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    apns_status SMALLINT NULL,
    reason VARCHAR(128) NULL,
    apns_unique_id VARCHAR(64) NULL,
    attempts INT NOT NULL,
    at BIGINT NOT NULL,
    PRIMARY KEY (notification_id, number, position)
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
