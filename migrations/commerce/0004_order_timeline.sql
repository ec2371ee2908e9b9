-- What the customer sees of an order: one entry per event that means something to him.
--
-- Promises
--   * Written in the transaction of the effect, once per event; never changed, never deleted.
--   * In the order of `id`, the entries of one order stand in the order in which they took effect: they are inserted under
--     the order's row lock.

CREATE TABLE commerce.order_timeline (
    id              bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT order_timeline_pkey PRIMARY KEY,
    order_id        text COLLATE "C" NOT NULL,
    event_id        uuid             NOT NULL,
    shipment_id     text             NOT NULL,
    kind            text             NOT NULL,
    -- When logistics decided it.
    happened_at     timestamptz      NOT NULL,
    units           bigint           NOT NULL,
    carrier         text             NOT NULL,
    tracking_number text,
    reason          text,

    CONSTRAINT order_timeline_event_once UNIQUE (event_id),
    CONSTRAINT order_timeline_order_exists FOREIGN KEY (order_id) REFERENCES commerce.orders (id),
    CONSTRAINT order_timeline_kind_known CHECK (kind IN ('shipped', 'delayed', 'resumed', 'cancelled', 'returned')),
    CONSTRAINT order_timeline_units_positive CHECK (units >= 1)
);
CREATE INDEX order_timeline_order ON commerce.order_timeline (order_id, id);

GRANT SELECT, INSERT ON commerce.order_timeline TO commerce_svc;
