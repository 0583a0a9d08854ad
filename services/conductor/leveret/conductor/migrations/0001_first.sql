-- The whole of Leveret's truth (law 1). Only the conductor writes; the API may only read.

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'leveret_conductor') THEN
        CREATE ROLE leveret_conductor NOLOGIN;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'leveret_api') THEN
        CREATE ROLE leveret_api NOLOGIN;
    END IF;
END
$$;

CREATE TABLE projects (
    id text PRIMARY KEY CHECK (id ~ '^[a-z][a-z0-9-]{0,61}$'),
    -- The number of the project's newest event, and of the newest that was published (see events).
    last_seq bigint NOT NULL DEFAULT 0,
    published_seq bigint NOT NULL DEFAULT 0 CHECK (published_seq <= last_seq),
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE tokens (
    id uuid PRIMARY KEY,
    project_id text NOT NULL REFERENCES projects,
    name text NOT NULL,
    role text NOT NULL CHECK (role IN ('admin', 'member', 'reader')),
    -- SHA-256 of the whole token: the token itself is 256 random bits and is stored nowhere.
    hash bytea NOT NULL UNIQUE CHECK (length(hash) = 32),
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    revoked_at timestamptz
);

CREATE TABLE images (
    name text PRIMARY KEY,
    url text NOT NULL,
    sha256 text NOT NULL CHECK (sha256 ~ '^[0-9a-f]{64}$'),
    format text NOT NULL CHECK (format IN ('qcow2', 'raw')),
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE networks (
    name text PRIMARY KEY,
    cidr cidr NOT NULL CHECK (family(cidr) = 4 AND masklen(cidr) BETWEEN 8 AND 29),
    gateway inet NOT NULL CHECK (gateway << cidr),
    dns inet[] NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now()
);

-- Every address a network may give out is a row, so that taking one is taking a row: no race, no scan for gaps.
CREATE TABLE addresses (
    network text NOT NULL REFERENCES networks ON DELETE CASCADE,
    address inet NOT NULL,
    vm_id uuid,
    -- The longest free is given out first, so that neighbours' ARP caches have forgotten it.
    freed_at timestamptz NOT NULL DEFAULT '-infinity',
    PRIMARY KEY (network, address)
);
CREATE INDEX addresses_free ON addresses (network, freed_at, address) WHERE vm_id IS NULL;
CREATE UNIQUE INDEX addresses_taken ON addresses (vm_id) WHERE vm_id IS NOT NULL;

CREATE TABLE hosts (
    id uuid PRIMARY KEY,
    name text NOT NULL,
    zone text NOT NULL,
    labels jsonb NOT NULL DEFAULT '{}',
    state text NOT NULL DEFAULT 'up'
        CHECK (state IN ('up', 'cordoned', 'draining', 'silent', 'fenced', 'retired')),
    state_reason text,
    -- The incarnation of its worker: it only grows.
    epoch bigint NOT NULL,
    virt_type text NOT NULL,
    version text NOT NULL,
    -- What may be placed: (total - reserve) x ratio, and never below what is placed already.
    vcpus integer NOT NULL,
    memory_mib bigint NOT NULL,
    disk_gib bigint NOT NULL,
    -- What is placed: the sum over its VMs. These CHECKs make overbooking impossible (law 4).
    vcpus_used integer NOT NULL DEFAULT 0 CHECK (vcpus_used BETWEEN 0 AND vcpus),
    memory_mib_used bigint NOT NULL DEFAULT 0 CHECK (memory_mib_used BETWEEN 0 AND memory_mib),
    disk_gib_used bigint NOT NULL DEFAULT 0 CHECK (disk_gib_used BETWEEN 0 AND disk_gib),
    -- Builds that failed since the last that did not.
    failures integer NOT NULL DEFAULT 0 CHECK (failures >= 0),
    foreign_domains integer NOT NULL DEFAULT 0,
    problem jsonb,
    heartbeat_at timestamptz NOT NULL DEFAULT now(),
    created_at timestamptz NOT NULL DEFAULT now()
);

-- A new number for every placement: a fence that needs no clock.
CREATE SEQUENCE placement_tokens AS bigint;

CREATE TABLE vms (
    id uuid PRIMARY KEY,
    project_id text NOT NULL REFERENCES projects,
    name text NOT NULL CHECK (name ~ '^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$'),
    -- The request as it was accepted, without user-data; and the hash of all of it, to know a repetition by.
    spec jsonb NOT NULL,
    spec_hash bytea NOT NULL CHECK (length(spec_hash) = 32),
    labels jsonb NOT NULL DEFAULT '{}',
    vcpus integer NOT NULL CHECK (vcpus > 0),
    memory_mib bigint NOT NULL CHECK (memory_mib > 0),
    disk_gib bigint NOT NULL CHECK (disk_gib > 0),
    image jsonb NOT NULL,
    network text NOT NULL REFERENCES networks,
    address inet,
    mac text NOT NULL,

    -- Wanted.
    desired text NOT NULL CHECK (desired IN ('running', 'stopped', 'deleted')),
    generation bigint NOT NULL DEFAULT 1 CHECK (generation > 0),
    restarts integer NOT NULL DEFAULT 0 CHECK (restarts >= 0),
    grace_s integer NOT NULL DEFAULT 60,

    -- Placed. The row is the allocation.
    host_id uuid REFERENCES hosts,
    token bigint,
    attempts integer NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    -- The hosts that failed to build it, each with its problem: [{"host_id", "problem"}].
    failed_hosts jsonb NOT NULL DEFAULT '[]',

    -- Seen.
    state text NOT NULL
        CHECK (state IN ('pending', 'building', 'running', 'stopped', 'deleting', 'deleted', 'error')),
    step text,
    observed_generation bigint NOT NULL DEFAULT 0 CHECK (observed_generation BETWEEN 0 AND generation),
    report_epoch bigint NOT NULL DEFAULT 0,
    report_seq bigint NOT NULL DEFAULT 0,
    guest_ready boolean NOT NULL DEFAULT false,
    steps jsonb NOT NULL DEFAULT '[]',
    ssh jsonb,
    problem jsonb,

    -- When the sweeper looks at it again. No state can be left only by a message (law 5).
    deadline timestamptz,
    -- When its command was last sent, so that the sweeper repeats it no oftener than it must.
    sent_at timestamptz,
    -- The newest requests that were carried out, so that a repeated one is not carried out again.
    recent_requests text[] NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),

    CHECK ((host_id IS NULL) = (token IS NULL)),
    CHECK (host_id IS NOT NULL OR state IN ('pending', 'deleted', 'error')),
    CHECK (host_id IS NULL OR state NOT IN ('pending', 'deleted')),
    CHECK (deadline IS NOT NULL OR state NOT IN ('pending', 'building', 'deleting')),
    CHECK (deadline IS NOT NULL OR observed_generation = generation OR state IN ('error', 'deleted')),
    CHECK (problem IS NOT NULL OR state <> 'error'),
    CHECK ((desired = 'deleted') = (state IN ('deleting', 'deleted'))),
    CHECK (address IS NULL OR state <> 'deleted')
);
CREATE UNIQUE INDEX vms_name ON vms (project_id, name) WHERE state <> 'deleted';
CREATE INDEX vms_list ON vms (project_id, id);
CREATE INDEX vms_live ON vms (project_id, id) WHERE state <> 'deleted';
CREATE INDEX vms_host ON vms (host_id) WHERE host_id IS NOT NULL;
CREATE INDEX vms_deadline ON vms (deadline) WHERE deadline IS NOT NULL;
CREATE INDEX vms_pending ON vms (created_at) WHERE state = 'pending';
CREATE INDEX vms_labels ON vms USING gin (labels jsonb_path_ops);

-- The table of moves, as in leveret.shared.lifecycle; a test holds the two together.
CREATE FUNCTION vm_move_is_legal(old text, new text) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT old = new OR CASE old
        WHEN 'pending' THEN new IN ('building', 'deleting', 'deleted', 'error')
        WHEN 'building' THEN new IN ('pending', 'running', 'stopped', 'deleting', 'error')
        WHEN 'running' THEN new IN ('stopped', 'deleting', 'error')
        WHEN 'stopped' THEN new IN ('running', 'deleting', 'error')
        WHEN 'error' THEN new IN ('pending', 'running', 'stopped', 'deleting', 'deleted')
        WHEN 'deleting' THEN new IN ('deleted')
        ELSE false
    END
$$;

CREATE FUNCTION vms_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT vm_move_is_legal(OLD.state, NEW.state) THEN
        RAISE EXCEPTION 'vm % cannot go from % to %', OLD.id, OLD.state, NEW.state USING ERRCODE = 'LV001';
    END IF;
    IF NEW.generation < OLD.generation OR NEW.token < OLD.token THEN
        RAISE EXCEPTION 'generation or token of vm % would go back', OLD.id USING ERRCODE = 'LV002';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER vms_guard BEFORE UPDATE OF state, generation, token ON vms
    FOR EACH ROW EXECUTE FUNCTION vms_guard();

-- Write-only for everybody but the conductor; wiped when the guest is ready or the VM is deleted.
CREATE TABLE vm_user_data (
    vm_id uuid PRIMARY KEY REFERENCES vms ON DELETE CASCADE,
    user_data bytea NOT NULL CHECK (length(user_data) <= 1048576)
);

-- Creates that were refused: every queued request has its VM or its recorded rejection.
CREATE TABLE rejections (
    vm_id uuid PRIMARY KEY,
    project_id text NOT NULL REFERENCES projects,
    request_id text NOT NULL,
    problem jsonb NOT NULL,
    at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX rejections_at ON rejections (at);

-- Ids that were deleted before they were created: the create, when it comes, finds this and stays undone.
CREATE TABLE tombstones (
    vm_id uuid NOT NULL,
    project_id text NOT NULL REFERENCES projects,
    at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (vm_id, project_id)
);
CREATE INDEX tombstones_at ON tombstones (at);

-- Append-only. `id` orders the facts of one VM; `seq` is given by the relay after the commit and counts the events of
-- a project without a gap, in an order in which they became visible: a watcher resumes after it.
CREATE TABLE events (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    project_id text NOT NULL REFERENCES projects,
    vm_id uuid NOT NULL,
    vm_name text NOT NULL,
    seq bigint,
    type text NOT NULL,
    -- The state after the event; `moved_from` is set when the event is a move.
    state text NOT NULL,
    moved_from text,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    data jsonb NOT NULL DEFAULT '{}',
    CHECK (moved_from IS NULL OR vm_move_is_legal(moved_from, state))
);
CREATE UNIQUE INDEX events_seq ON events (project_id, seq) WHERE seq IS NOT NULL;
CREATE INDEX events_new ON events (id) WHERE seq IS NULL;
CREATE INDEX events_vm ON events (vm_id, id);

-- The network that is there from the start. Its addresses: all but network, gateway, and broadcast.
CREATE FUNCTION create_network(new_name text, new_cidr cidr, new_gateway inet, new_dns inet[]) RETURNS void
LANGUAGE sql AS $$
    INSERT INTO networks (name, cidr, gateway, dns) VALUES (new_name, new_cidr, new_gateway, new_dns);
    INSERT INTO addresses (network, address)
    SELECT new_name, host(new_cidr::inet + n)::inet
    FROM generate_series(1::bigint, (2 ^ (32 - masklen(new_cidr)))::bigint - 2) AS n
    WHERE host(new_cidr::inet + n)::inet <> host(new_gateway)::inet;
$$;

GRANT USAGE ON SCHEMA public TO leveret_conductor, leveret_api;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO leveret_conductor;
GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO leveret_conductor;
GRANT SELECT ON
    projects, tokens, images, networks, addresses, hosts, vms, rejections, tombstones, events TO leveret_api;
