-- The next user id to give to a service in an environment. It only grows: what an earlier owner of an id left in the
-- kernel or on the disk must never be a later one's.
CREATE TABLE user_ids (
    id INTEGER PRIMARY KEY NOT NULL CHECK (id = 1),
    next INTEGER NOT NULL
);
-- Before this table, the id of a service that was removed could be given out again. An installation that has been used
-- skips ids, so that none of them is.
INSERT INTO user_ids (id, next)
SELECT 1, COALESCE(MAX(uid) + 1, 200000) + CASE WHEN (SELECT revision FROM routing WHERE id = 1) > 1 THEN 10000 ELSE 0 END
FROM placements;
