-- The dictionary of reasons: the compact outcomes of chunks hold codes. apns_status 0: a word of our own.
CREATE TABLE IF NOT EXISTS reasons (
    code INT NOT NULL AUTO_INCREMENT PRIMARY KEY,
    apns_status SMALLINT NOT NULL,
    reason VARCHAR(128) NOT NULL,
    UNIQUE KEY reasons_word (apns_status, reason)
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
