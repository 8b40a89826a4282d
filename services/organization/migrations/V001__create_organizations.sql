CREATE TABLE organizations (
    id UUID PRIMARY KEY NOT NULL,
    name TEXT NOT NULL,
    slug TEXT NOT NULL,
    -- The user whose personal organization this is.
    personal_of UUID UNIQUE,
    created_at BIGINT NOT NULL,
    deleted_at BIGINT
);
CREATE UNIQUE INDEX organizations_slug ON organizations (slug) WHERE deleted_at IS NULL;

-- A null role is a tombstone: the sequence goes on rising when a member comes back.
CREATE TABLE members (
    organization_id UUID NOT NULL REFERENCES organizations (id),
    user_id UUID NOT NULL,
    role TEXT CHECK (role IN ('viewer', 'developer', 'admin', 'owner')),
    sequence BIGINT NOT NULL,
    joined_at BIGINT NOT NULL,
    PRIMARY KEY (organization_id, user_id)
);
CREATE INDEX members_of_user ON members (user_id);
