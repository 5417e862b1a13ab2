-- Version 2 of the tables of outbox and inbox, for SQLite 3.51.3 or later: run after 1.sql.

-- Calls of handlers to somebody else that began, and have not ended.
CREATE TABLE evt_intent (
  consumer TEXT NOT NULL,
  message_id BLOB NOT NULL,
  runs INTEGER NOT NULL DEFAULT 1,
  begun_at INTEGER NOT NULL DEFAULT (CAST(unixepoch('subsec') * 1000 AS INTEGER)),
  PRIMARY KEY (consumer, message_id)
) STRICT, WITHOUT ROWID;

UPDATE evt_meta SET value = '2' WHERE name = 'version';
