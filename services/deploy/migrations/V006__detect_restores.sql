-- One row, which backups and copies of the database leave out. Where it is missing, the database may be older than the
-- ids that were taken from it, and the next user id skips those.
CREATE TABLE restore_marks (
    id INTEGER PRIMARY KEY NOT NULL CHECK (id = 1)
);
