-- Identity is topic + token. seq is what chunks hold; id is public. Texts that callers choose are compared as bytes.
CREATE TABLE IF NOT EXISTS devices (
    seq BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY,
    id BINARY(16) NOT NULL,
    topic VARCHAR(155) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    token VARBINARY(256) NOT NULL,
    push_type VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    activity_id VARBINARY(255) NULL,
    user_id VARBINARY(255) NULL,
    generation BIGINT NOT NULL,
    installation_id VARBINARY(255) NULL,
    environment VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin NULL,       -- learned, or as named
    environment_named VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin NULL, -- what the last registration that named one named
    locale VARBINARY(64) NULL,
    time_zone VARBINARY(64) NULL,
    app_version VARBINARY(64) NULL,
    os_version VARBINARY(64) NULL,
    model VARBINARY(64) NULL,
    status VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    status_reason VARCHAR(128) NULL,
    created_at BIGINT NOT NULL,
    last_registered_at BIGINT NOT NULL,
    last_accepted_at BIGINT NOT NULL,                                         -- to within a day; 0: never accepted
    UNIQUE KEY devices_id (id),
    UNIQUE KEY devices_token (topic, token),
    KEY devices_user (user_id, topic),                  -- user_ids audiences, lists
    KEY devices_installation (installation_id, topic),  -- replaced tokens, log-out
    KEY devices_topic (topic, seq),                     -- everyone's devices of one app, lists by app
    CONSTRAINT devices_status CHECK (status IN ('active', 'inactive', 'suspended'))
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
