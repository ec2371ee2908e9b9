-- Orders and their lines.
--
-- Promises
--   * `status` follows from the lines alone: cancelled (every piece), returned (everything that was shipped came back and
--     nothing is outstanding), shipped (nothing is outstanding), partially_shipped, paid. It is written in the transaction
--     that changes a line, under the order's row lock.
--   * Lines are changed only under their order's row lock; they have no locks of their own.
--   * quantity = outstanding + shipped + cancelled, and nothing comes back that was not shipped.
--   * Nothing is ever deleted here.

CREATE TABLE commerce.orders (
    id           text COLLATE "C" CONSTRAINT orders_pkey PRIMARY KEY,
    customer_id  text        NOT NULL,
    ordered_on   date        NOT NULL,
    required_on  date,
    carrier      text        NOT NULL,
    ship_name    text        NOT NULL,
    ship_city    text        NOT NULL,
    ship_country text        NOT NULL,
    status       text        NOT NULL,
    updated_at   timestamptz NOT NULL DEFAULT now(),

    CONSTRAINT orders_id_length CHECK (octet_length(id) BETWEEN 1 AND 64),
    CONSTRAINT orders_status_known CHECK (status IN ('paid', 'partially_shipped', 'shipped', 'cancelled', 'returned'))
) WITH (fillfactor = 80);

CREATE TABLE commerce.order_lines (
    order_id           text COLLATE "C" NOT NULL,
    sku                text COLLATE "C" NOT NULL,
    quantity           integer          NOT NULL,
    unit_price         numeric(12, 4)   NOT NULL,
    shipped_quantity   integer          NOT NULL DEFAULT 0,
    returned_quantity  integer          NOT NULL DEFAULT 0,
    cancelled_quantity integer          NOT NULL DEFAULT 0,

    CONSTRAINT order_lines_pkey PRIMARY KEY (order_id, sku),
    CONSTRAINT order_lines_order_exists FOREIGN KEY (order_id) REFERENCES commerce.orders (id),
    CONSTRAINT order_lines_product_exists FOREIGN KEY (sku) REFERENCES commerce.products (sku),
    CONSTRAINT order_lines_quantity_positive CHECK (quantity >= 1),
    CONSTRAINT order_lines_unit_price_not_negative CHECK (unit_price >= 0),
    CONSTRAINT order_lines_shipped_not_negative CHECK (shipped_quantity >= 0),
    CONSTRAINT order_lines_cancelled_not_negative CHECK (cancelled_quantity >= 0),
    CONSTRAINT order_lines_shipped_within_ordered CHECK (shipped_quantity + cancelled_quantity <= quantity),
    CONSTRAINT order_lines_returned_within_shipped CHECK (returned_quantity BETWEEN 0 AND shipped_quantity)
) WITH (fillfactor = 80);

GRANT SELECT, INSERT ON commerce.orders, commerce.order_lines TO commerce_svc;
GRANT UPDATE (status, updated_at) ON commerce.orders TO commerce_svc;
GRANT UPDATE (shipped_quantity, returned_quantity, cancelled_quantity) ON commerce.order_lines TO commerce_svc;
