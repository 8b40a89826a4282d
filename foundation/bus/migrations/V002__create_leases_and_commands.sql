-- Which process does the service's background work. The token rises with every new leader; the
-- session is the database server's name for the leader's connection.
CREATE TABLE leases (
    id INTEGER PRIMARY KEY NOT NULL CHECK (id = 1),
    token BIGINT NOT NULL,
    renewals BIGINT NOT NULL,
    session BIGINT
);

-- Commands that had an effect, for those that arrive twice; with their sealed replies.
CREATE TABLE commands (
    id UUID PRIMARY KEY NOT NULL,
    digest TEXT NOT NULL,
    reply BYTEA,
    done_at BIGINT NOT NULL
);
CREATE INDEX commands_done ON commands (done_at);

-- Until when a membership is taken for true without asking its owner.
ALTER TABLE memberships ADD COLUMN confirmed_at BIGINT NOT NULL DEFAULT 0;
