-- Events this service has to tell, written in the transaction that made them true.
CREATE TABLE outbox (
    id UUID PRIMARY KEY NOT NULL,
    kind TEXT NOT NULL,
    envelope TEXT NOT NULL,
    relayed_at BIGINT
);
CREATE INDEX outbox_unrelayed ON outbox (id) WHERE relayed_at IS NULL;

-- Events this service was told. A row's handling and its mark as done are one transaction.
CREATE TABLE inbox (
    id UUID PRIMARY KEY NOT NULL,
    kind TEXT NOT NULL,
    envelope TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('pending', 'done', 'dead')),
    attempts INTEGER NOT NULL,
    next_attempt_at BIGINT NOT NULL,
    last_error TEXT,
    received_at BIGINT NOT NULL
);
CREATE INDEX inbox_pending ON inbox (next_attempt_at) WHERE state = 'pending';

-- Who is a member of what, as far as this service was told. A null role is a tombstone.
CREATE TABLE memberships (
    organization_id UUID NOT NULL,
    user_id UUID NOT NULL,
    role TEXT,
    sequence BIGINT NOT NULL,
    PRIMARY KEY (organization_id, user_id)
);
