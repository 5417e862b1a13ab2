-- Version 1 of the tables of outbox and inbox, for SQLite 3.51.3 or later. `migrate()` runs this text with the prefix of
-- your choice in place of `evt_`; who migrates by other means runs it as it is.
CREATE TABLE evt_meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;

-- Events that wait to be published, in the order of `id`, which is the order of commits. An event without a key has its own
-- id as one. `head` is what else the event says, as JSON.
CREATE TABLE evt_outbox (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  shard INTEGER NOT NULL CHECK (shard BETWEEN 0 AND 63),
  event_id BLOB NOT NULL CHECK (length(event_id) = 16),
  topic TEXT NOT NULL,
  key BLOB NOT NULL,
  has_key INTEGER NOT NULL DEFAULT 1,
  size INTEGER NOT NULL CHECK (size >= 0),
  -- Milliseconds since 1970.
  created_at INTEGER NOT NULL DEFAULT (CAST(unixepoch('subsec') * 1000 AS INTEGER)),
  head TEXT NOT NULL,
  payload BLOB
) STRICT;

-- Who publishes which events: one relay a shard, under an epoch that grows with every change. A lease is in milliseconds of
-- the machine's own clock since its boot, and over with the boot.
CREATE TABLE evt_outbox_shard (
  shard INTEGER PRIMARY KEY,
  owner TEXT,
  epoch INTEGER NOT NULL DEFAULT 0,
  boot TEXT NOT NULL DEFAULT '',
  lease_until INTEGER NOT NULL DEFAULT 0
) STRICT;
WITH RECURSIVE numbers (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers WHERE n < 63)
INSERT INTO evt_outbox_shard (shard) SELECT n FROM numbers;

CREATE TABLE evt_outbox_relay (
  relay TEXT PRIMARY KEY,
  boot TEXT NOT NULL,
  seen_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Keys whose first event could not be published. The others of the key wait behind it.
CREATE TABLE evt_outbox_blocked (
  shard INTEGER NOT NULL,
  topic TEXT NOT NULL,
  key BLOB NOT NULL,
  head_id INTEGER NOT NULL,
  attempts INTEGER NOT NULL,
  may_pass INTEGER NOT NULL,
  -- Milliseconds since 1970.
  retry_at INTEGER NOT NULL,
  error TEXT NOT NULL,
  PRIMARY KEY (shard, topic, key)
) STRICT, WITHOUT ROWID;

-- Events that were set aside because they can never be published, or by an operator.
CREATE TABLE evt_outbox_parked (
  id INTEGER PRIMARY KEY,
  shard INTEGER NOT NULL,
  event_id BLOB NOT NULL,
  topic TEXT NOT NULL,
  key BLOB NOT NULL,
  has_key INTEGER NOT NULL,
  size INTEGER NOT NULL,
  created_at INTEGER NOT NULL,
  attempts INTEGER NOT NULL,
  error TEXT NOT NULL,
  parked_at INTEGER NOT NULL DEFAULT (CAST(unixepoch('subsec') * 1000 AS INTEGER)),
  head TEXT NOT NULL,
  payload BLOB
) STRICT;

-- What was handled, for each consumer: service.handler@generation. Rows are in the order of their time.
CREATE TABLE evt_inbox (
  id INTEGER PRIMARY KEY,
  consumer TEXT NOT NULL,
  message_id BLOB NOT NULL,
  seen_at INTEGER NOT NULL DEFAULT (CAST(unixepoch('subsec') * 1000 AS INTEGER)),
  UNIQUE (consumer, message_id)
) STRICT;

-- How far each key of a source was handled.
CREATE TABLE evt_key_progress (
  consumer TEXT NOT NULL,
  source TEXT NOT NULL,
  key BLOB NOT NULL,
  last_seq INTEGER NOT NULL,
  seen_at INTEGER NOT NULL DEFAULT (CAST(unixepoch('subsec') * 1000 AS INTEGER)),
  PRIMARY KEY (consumer, source, key)
) STRICT, WITHOUT ROWID;

-- How each consumer remembers, and for how long.
CREATE TABLE evt_consumer (
  consumer TEXT PRIMARY KEY,
  memory TEXT NOT NULL,
  remembers_seconds INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

INSERT INTO evt_meta VALUES ('version', '1');
