-- Projects with limits, tokens that can be looked after, broker users that speak for a project, and an API that sees
-- only the rows of the project it was asked about.

ALTER TABLE projects
    ADD COLUMN deleted_at timestamptz,
    -- The newest number among the events that are forgotten: what is greater is still all there.
    ADD COLUMN forgotten_seq bigint NOT NULL DEFAULT 0;

-- A project's limits (null is none), and the sum over its VMs that are not deleted. The CHECKs refuse what is too much.
CREATE TABLE quotas (
    project_id text PRIMARY KEY REFERENCES projects,
    vms_max integer CHECK (vms_max >= 0),
    vcpus_max integer CHECK (vcpus_max >= 0),
    memory_mib_max bigint CHECK (memory_mib_max >= 0),
    disk_gib_max bigint CHECK (disk_gib_max >= 0),
    vms_used integer NOT NULL DEFAULT 0 CHECK (vms_used >= 0 AND (vms_max IS NULL OR vms_used <= vms_max)),
    vcpus_used integer NOT NULL DEFAULT 0 CHECK (vcpus_used >= 0 AND (vcpus_max IS NULL OR vcpus_used <= vcpus_max)),
    memory_mib_used bigint NOT NULL DEFAULT 0
        CHECK (memory_mib_used >= 0 AND (memory_mib_max IS NULL OR memory_mib_used <= memory_mib_max)),
    disk_gib_used bigint NOT NULL DEFAULT 0
        CHECK (disk_gib_used >= 0 AND (disk_gib_max IS NULL OR disk_gib_used <= disk_gib_max)),
    -- The same as projects.deleted_at IS NOT NULL, here so that who waits for this row's lock then sees it.
    closed boolean NOT NULL DEFAULT false,
    requests_per_s integer NOT NULL DEFAULT 500 CHECK (requests_per_s > 0),
    request_burst integer NOT NULL DEFAULT 5000 CHECK (request_burst > 0)
);
INSERT INTO quotas (project_id, vms_used, vcpus_used, memory_mib_used, disk_gib_used)
SELECT p.id, count(v.id), coalesce(sum(v.vcpus), 0), coalesce(sum(v.memory_mib), 0), coalesce(sum(v.disk_gib), 0)
FROM projects p LEFT JOIN vms v ON v.project_id = p.id AND v.state <> 'deleted'
GROUP BY p.id;

CREATE FUNCTION projects_have_quotas() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO quotas (project_id) VALUES (NEW.id);
    RETURN NEW;
END
$$;
CREATE TRIGGER projects_have_quotas AFTER INSERT ON projects
    FOR EACH ROW EXECUTE FUNCTION projects_have_quotas();

-- How many requests a project may make at this moment. Unlogged: after a crash every bucket is full, which is harmless.
CREATE UNLOGGED TABLE request_buckets (
    project_id text PRIMARY KEY,
    level double precision NOT NULL,
    at timestamptz NOT NULL
);

-- Take up to `wanted` requests from each project's bucket; say how many were granted, and when there is one again.
-- A clock that goes back only delays the filling.
CREATE FUNCTION take_requests(asking text[], wanted integer[])
RETURNS TABLE (project text, granted integer, retry_after_s double precision)
LANGUAGE plpgsql AS $$
DECLARE
    ask record;
    full_level double precision;
BEGIN
    FOR ask IN
        SELECT q.project_id, w.n, q.requests_per_s AS rate, q.request_burst AS burst
        FROM unnest(asking, wanted) AS w (id, n) JOIN quotas q ON q.project_id = w.id ORDER BY q.project_id
    LOOP
        INSERT INTO request_buckets AS b (project_id, level, at) VALUES (ask.project_id, ask.burst, clock_timestamp())
        ON CONFLICT (project_id) DO UPDATE SET
            level = least(ask.burst, b.level + ask.rate * greatest(extract(epoch FROM excluded.at - b.at), 0)),
            at = excluded.at
        RETURNING b.level INTO full_level;
        project := ask.project_id;
        granted := least(ask.n, floor(full_level)::integer);
        retry_after_s := greatest(0, (1 - (full_level - granted)) / ask.rate);
        UPDATE request_buckets SET level = full_level - granted WHERE project_id = ask.project_id;
        RETURN NEXT;
    END LOOP;
END
$$;

ALTER TABLE tokens
    ADD COLUMN created_by text,
    ADD COLUMN last_used_at timestamptz;
-- A name stands for one token at a time: of those that share one, all but the newest get another.
UPDATE tokens SET name = left(name, 50) || '-' || left(id::text, 8)
WHERE revoked_at IS NULL AND id NOT IN (
    SELECT DISTINCT ON (project_id, name) id FROM tokens WHERE revoked_at IS NULL
    ORDER BY project_id, name, created_at DESC, id
);
CREATE UNIQUE INDEX tokens_name ON tokens (project_id, name) WHERE revoked_at IS NULL;

-- Whom the broker's word on a message's sender stands for.
CREATE TABLE amqp_users (
    name text PRIMARY KEY CHECK (name ~ '^[a-z][a-z0-9-]{0,61}$' AND name NOT LIKE 'leveret%'),
    project_id text NOT NULL REFERENCES projects,
    role text NOT NULL CHECK (role IN ('member', 'reader')),
    created_at timestamptz NOT NULL DEFAULT now(),
    created_by text
);
CREATE INDEX amqp_users_project ON amqp_users (project_id);

-- What administrators asked for, each with the answer it got (null: it was done), so that one that comes again, however
-- late, is answered and not done again. `digest` is the SHA-256 of what was asked.
CREATE TABLE orders (
    project_id text NOT NULL,
    request_id text NOT NULL,
    digest bytea NOT NULL,
    problem jsonb,
    at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (project_id, request_id, digest)
);
CREATE INDEX orders_at ON orders (at);

-- An id may be refused in one project and live, or be refused, in another. The table is small: refusals are forgotten.
-- squawk-ignore ban-drop-constraint
ALTER TABLE rejections DROP CONSTRAINT rejections_pkey;
-- squawk-ignore constraint-missing-not-valid, adding-serial-primary-key-field
ALTER TABLE rejections ADD PRIMARY KEY (vm_id, project_id);

-- Events may be about other things than VMs, or about a VM that never came to be. Older rows satisfy both rules, since
-- none of these columns could be null. Nothing has been released that reads the table and would stumble over a null.
-- squawk-ignore ban-drop-not-null
ALTER TABLE events ALTER COLUMN vm_id DROP NOT NULL;
-- squawk-ignore ban-drop-not-null
ALTER TABLE events ALTER COLUMN vm_name DROP NOT NULL;
-- squawk-ignore ban-drop-not-null
ALTER TABLE events ALTER COLUMN state DROP NOT NULL;
ALTER TABLE events ADD CONSTRAINT events_state CHECK (state IS NULL OR vm_id IS NOT NULL) NOT VALID;
ALTER TABLE events ADD CONSTRAINT events_move CHECK (moved_from IS NULL OR state IS NOT NULL) NOT VALID;
CREATE INDEX events_rejected ON events (project_id, (data->>'request_id')) WHERE state IS NULL AND type = 'rejected';

-- The API sees one project at a time: the one it names in the setting leveret.project before it reads. '*' shows every
-- project with its limits, for administrators, and nothing of what is in them.
CREATE FUNCTION asked_project() RETURNS text LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT current_setting('leveret.project', true)
$$;

ALTER TABLE projects ENABLE ROW LEVEL SECURITY;
ALTER TABLE quotas ENABLE ROW LEVEL SECURITY;
ALTER TABLE tokens ENABLE ROW LEVEL SECURITY;
ALTER TABLE amqp_users ENABLE ROW LEVEL SECURITY;
ALTER TABLE vms ENABLE ROW LEVEL SECURITY;
ALTER TABLE rejections ENABLE ROW LEVEL SECURITY;
ALTER TABLE tombstones ENABLE ROW LEVEL SECURITY;
ALTER TABLE events ENABLE ROW LEVEL SECURITY;

CREATE POLICY conductor ON projects TO leveret_conductor USING (true);
CREATE POLICY conductor ON quotas TO leveret_conductor USING (true);
CREATE POLICY conductor ON tokens TO leveret_conductor USING (true);
CREATE POLICY conductor ON amqp_users TO leveret_conductor USING (true);
CREATE POLICY conductor ON vms TO leveret_conductor USING (true);
CREATE POLICY conductor ON rejections TO leveret_conductor USING (true);
CREATE POLICY conductor ON tombstones TO leveret_conductor USING (true);
CREATE POLICY conductor ON events TO leveret_conductor USING (true);

CREATE POLICY api ON projects FOR SELECT TO leveret_api USING (id = asked_project() OR asked_project() = '*');
CREATE POLICY api ON quotas FOR SELECT TO leveret_api USING (project_id = asked_project() OR asked_project() = '*');
CREATE POLICY api ON tokens FOR SELECT TO leveret_api USING (project_id = asked_project());
CREATE POLICY api ON amqp_users FOR SELECT TO leveret_api USING (project_id = asked_project());
CREATE POLICY api ON vms FOR SELECT TO leveret_api USING (project_id = asked_project());
CREATE POLICY api ON rejections FOR SELECT TO leveret_api USING (project_id = asked_project());
CREATE POLICY api ON tombstones FOR SELECT TO leveret_api USING (project_id = asked_project());
CREATE POLICY api ON events FOR SELECT TO leveret_api USING (project_id = asked_project());

-- Who presents this hash. The API cannot read hashes, only ask about the one it was given.
CREATE FUNCTION identify(presented bytea)
RETURNS TABLE (id uuid, project_id text, role text, name text, revoked boolean, expired boolean)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT t.id, t.project_id, t.role, t.name, t.revoked_at IS NOT NULL OR p.deleted_at IS NOT NULL,
           coalesce(t.expires_at <= now(), false)
    FROM public.tokens t JOIN public.projects p ON p.id = t.project_id WHERE t.hash = presented
$$;

-- How many VMs of all projects stand on each host.
CREATE FUNCTION vms_per_host() RETURNS TABLE (host_id uuid, vms bigint)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT v.host_id, count(*) FROM public.vms v WHERE v.host_id IS NOT NULL GROUP BY v.host_id
$$;

-- Nobody needs tables of his own; in one, a function of the owner's could be led astray.
DO $$
BEGIN
    EXECUTE format('REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC', current_database());
END
$$;
REVOKE SELECT ON addresses FROM leveret_api;
REVOKE ALL ON FUNCTION identify(bytea), vms_per_host(), take_requests(text[], integer[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION identify(bytea), vms_per_host() TO leveret_api;
GRANT EXECUTE ON FUNCTION take_requests(text[], integer[]) TO leveret_conductor;
REVOKE SELECT ON tokens FROM leveret_api;
GRANT SELECT (id, project_id, name, role, created_at, created_by, expires_at, last_used_at, revoked_at)
    ON tokens TO leveret_api;
GRANT SELECT ON quotas, amqp_users TO leveret_api;
GRANT SELECT, INSERT, UPDATE, DELETE ON quotas, request_buckets, amqp_users, orders TO leveret_conductor;
