use std::io::IsTerminal;

use clap::{Args, ValueEnum};
use opentelemetry::{KeyValue, trace::TracerProvider as _};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig};
use opentelemetry_sdk::{
    Resource, metrics::SdkMeterProvider, propagation::TraceContextPropagator, trace::SdkTracerProvider,
};
use prometheus::{Registry, TextEncoder};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::{EnvFilter, Layer, filter::FilterFn, layer::SubscriberExt, util::SubscriberInitExt};

/// Spans with this target are made for traces only: they go to OpenTelemetry and never into a log line.
pub const TRACE_TARGET: &str = "trace";

/// The span of an HTTP request, where every trace here begins or goes on.
pub(crate) const REQUEST_SPAN: &str = "HTTP request";

#[derive(Debug, Clone, Args)]
pub struct TelemetrySettings {
    /// Log lines as `json`, `pretty`, or `auto`: pretty on a terminal, JSON otherwise.
    #[arg(long, env = "LOG_FORMAT", default_value = "auto")]
    pub log_format: LogFormat,
    /// Log filter, e.g. `info,outbox=debug`. A filter that does not parse stops the start. The default leaves out the
    /// notices that a database sends with every connection it cuts.
    #[arg(long, env = "LOG_LEVEL", default_value = "info,sqlx::postgres::notice=error")]
    pub log_level: String,
    /// Base URL of an OTLP/HTTP collector for spans, e.g. `http://127.0.0.1:4318`. Without it nothing is exported; the
    /// trace context still travels with every event.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT")]
    pub otlp_endpoint: Option<String>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum LogFormat {
    Auto,
    Json,
    Pretty,
}

/// Holds the providers until the process ends.
#[derive(Debug, Clone)]
pub struct Telemetry {
    registry: Registry,
    meters: SdkMeterProvider,
    tracer: SdkTracerProvider,
}

impl Telemetry {
    /// Installs logs, metrics and traces for the whole process. Call once, first thing, outside async code: the OTLP
    /// client blocks.
    ///
    /// # Errors
    /// A log filter or endpoint that does not parse, or a second installation.
    pub fn install(service: &'static str, settings: &TelemetrySettings) -> anyhow::Result<Self> {
        let resource = Resource::builder()
            .with_service_name(service)
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();

        let registry = Registry::new();
        let reader = opentelemetry_prometheus::exporter()
            .with_registry(registry.clone())
            .build()?;
        let meters = SdkMeterProvider::builder()
            .with_reader(reader)
            .with_resource(resource.clone())
            .build();
        opentelemetry::global::set_meter_provider(meters.clone());

        let mut tracer = SdkTracerProvider::builder().with_resource(resource);
        // A compose file passes on a variable that is not set as an empty one.
        let endpoint = settings
            .otlp_endpoint
            .as_deref()
            .filter(|endpoint| !endpoint.is_empty());
        if let Some(endpoint) = endpoint {
            let exporter = SpanExporter::builder()
                .with_http()
                .with_protocol(Protocol::HttpBinary)
                .with_endpoint(format!("{}/v1/traces", endpoint.trim_end_matches('/')))
                .build()?;
            tracer = tracer.with_batch_exporter(exporter);
        }
        let tracer = tracer.build();
        let exporting = endpoint.is_some();
        if exporting {
            // The relay makes its spans after the fact and without `tracing`; unset, they cost nothing.
            opentelemetry::global::set_tracer_provider(tracer.clone());
        }
        opentelemetry::global::set_text_map_propagator(TraceContextPropagator::new());

        let filter = EnvFilter::try_new(&settings.log_level)?;
        let json = match settings.log_format {
            LogFormat::Json => true,
            LogFormat::Pretty => false,
            LogFormat::Auto => !std::io::stderr().is_terminal(),
        };
        let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
        let lines = if json {
            lines.json().flatten_event(true).with_current_span(true).boxed()
        } else {
            lines
                .with_ansi(std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()))
                .boxed()
        };
        let lines = lines
            .with_filter(FilterFn::new(|metadata| metadata.target() != TRACE_TARGET))
            .with_filter(filter);
        // The exporter's own client must not make spans that are exported again.
        let spans = tracing_opentelemetry::layer()
            .with_tracer(tracer.tracer(service))
            // Without an exporter only the request's own span is made: it gives every event its trace.
            .with_filter(FilterFn::new(move |metadata| {
                metadata.target() == TRACE_TARGET && (exporting || metadata.name() == REQUEST_SPAN)
            }));
        tracing_subscriber::registry().with(lines).with(spans).try_init()?;
        Ok(Self {
            registry,
            meters,
            tracer,
        })
    }

    /// All metrics as Prometheus text, format 0.0.4.
    ///
    /// # Errors
    /// If two instruments of one name disagree; a defect of the program.
    pub fn prometheus(&self) -> anyhow::Result<String> {
        Ok(TextEncoder::new().encode_to_string(&self.registry.gather())?)
    }

    /// Sends what is buffered. Blocks up to the exporter's timeout, so call it outside async code.
    pub fn flush(self) {
        if let Err(error) = self.tracer.shutdown() {
            tracing::warn!(%error, "the last spans could not be exported");
        }
        if let Err(error) = self.meters.shutdown() {
            tracing::warn!(%error, "the meter provider did not shut down cleanly");
        }
    }
}

/// The W3C `traceparent` of a span, to be stored with an event; `None` if the span is not part of a trace.
pub fn traceparent(span: &tracing::Span) -> Option<String> {
    use opentelemetry::trace::TraceContextExt;
    let context = span.context();
    let span = context.span();
    let context = span.span_context();
    context.is_valid().then(|| {
        format!(
            "00-{}-{}-{:02x}",
            context.trace_id(),
            context.span_id(),
            context.trace_flags().to_u8()
        )
    })
}

/// Makes a span the child of the one that a `traceparent` names; a text that is not one changes nothing.
pub fn set_parent(span: &tracing::Span, traceparent: &str) {
    let carrier = std::collections::HashMap::from([("traceparent".to_owned(), traceparent.to_owned())]);
    let parent = opentelemetry::global::get_text_map_propagator(|propagator| propagator.extract(&carrier));
    // A disabled span has no parent to set; that is not a failure.
    if !span.is_disabled()
        && let Err(error) = span.set_parent(parent)
    {
        tracing::debug!(%error, "the trace of this span could not be joined");
    }
}
