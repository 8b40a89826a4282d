-- One reserved id per address and organization: whoever registers with an organization's token gets what that
-- organization invited them to, and nothing else. An older server names no organization; such an id cannot be had.
CREATE TABLE reserved_users (
    user_id UUID PRIMARY KEY NOT NULL,
    email TEXT NOT NULL,
    organization_id UUID,
    created_at BIGINT NOT NULL,
    UNIQUE (email, organization_id)
);

-- Ids that several organizations share are forgotten: each of them can invite again.
INSERT INTO reserved_users (user_id, email, organization_id, created_at)
SELECT i.user_id, i.email, t.organization_id, i.created_at
FROM invited_users i JOIN registration_tokens t ON t.user_id = i.user_id
WHERE NOT EXISTS (
    SELECT 1 FROM registration_tokens o WHERE o.user_id = t.user_id AND o.organization_id <> t.organization_id
);

CREATE TABLE reserved_tokens (
    digest TEXT PRIMARY KEY NOT NULL,
    user_id UUID NOT NULL REFERENCES reserved_users (user_id) ON DELETE CASCADE,
    organization_id UUID NOT NULL,
    expires_at BIGINT NOT NULL,
    UNIQUE (user_id, organization_id)
);
INSERT INTO reserved_tokens (digest, user_id, organization_id, expires_at)
SELECT digest, user_id, organization_id, expires_at FROM registration_tokens
WHERE user_id IN (SELECT user_id FROM reserved_users);

DROP TABLE registration_tokens;
DROP TABLE invited_users;
ALTER TABLE reserved_users RENAME TO invited_users;
ALTER TABLE reserved_tokens RENAME TO registration_tokens;
