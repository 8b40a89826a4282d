-- Archived because its organization is being deleted, not by somebody's wish.
ALTER TABLE projects ADD COLUMN closed BOOLEAN NOT NULL DEFAULT FALSE;
