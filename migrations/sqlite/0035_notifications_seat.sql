-- and its place there.
ALTER TABLE notifications ADD COLUMN seat INTEGER NULL;
