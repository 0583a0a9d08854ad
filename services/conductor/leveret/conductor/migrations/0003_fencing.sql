-- Hosts that are proven to be off, and what becomes of their VMs.

-- The incarnation of a fenced host's worker that was declared off, and the one that listed nothing of what is over since:
-- only in that one may the host take work again.
ALTER TABLE hosts ADD COLUMN fenced_epoch bigint;
ALTER TABLE hosts ADD COLUMN clean_epoch bigint;

-- Whether its user-data was wiped because the guest had read it: made anew, it would be another VM.
ALTER TABLE vms ADD COLUMN user_data_wiped boolean NOT NULL DEFAULT false;

-- A VM that ran on a fenced host, or stood there, may be made anew on another one.
CREATE OR REPLACE FUNCTION vm_move_is_legal(old text, new text) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT old = new OR CASE old
        WHEN 'pending' THEN new IN ('building', 'deleting', 'deleted', 'error')
        WHEN 'building' THEN new IN ('pending', 'running', 'stopped', 'deleting', 'error')
        WHEN 'running' THEN new IN ('pending', 'stopped', 'deleting', 'error')
        WHEN 'stopped' THEN new IN ('pending', 'running', 'deleting', 'error')
        WHEN 'error' THEN new IN ('pending', 'running', 'stopped', 'deleting', 'deleted')
        WHEN 'deleting' THEN new IN ('deleted')
        ELSE false
    END
$$;
CREATE INDEX hosts_fenced ON hosts (id) WHERE state = 'fenced';

-- How many VMs of all projects stand on each host, and how many of them are made anew elsewhere once it is fenced.
CREATE FUNCTION vms_on_hosts() RETURNS TABLE (host_id uuid, vms bigint, vms_to_restart bigint)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT v.host_id, count(*), count(*) FILTER (WHERE v.state = 'building'
        OR (v.state IN ('running', 'stopped') AND v.spec ->> 'on_host_failure' = 'restart'))
    FROM public.vms v WHERE v.host_id IS NOT NULL GROUP BY v.host_id
$$;
REVOKE ALL ON FUNCTION vms_on_hosts() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION vms_on_hosts() TO leveret_api;
