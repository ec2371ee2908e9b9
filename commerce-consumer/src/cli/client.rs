use std::time::Duration;

use reqwest::{Method, RequestBuilder, Response, Url, header, redirect};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use service_runtime::settings::Secret;

use super::{
    Common,
    failure::{Ended, Failure, MAY_BE_DONE, Problem, Told, causes},
};

/// The API's own ceiling.
const PAGE: u32 = 200;
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

pub(super) struct Client {
    http: reqwest::Client,
    base: Url,
    token: Option<Secret>,
}

/// A list that the API gives page by page.
pub(super) struct Listing<'a> {
    pub(super) path: &'a [&'a str],
    pub(super) query: Vec<(&'static str, String)>,
    /// The field that holds the items.
    pub(super) items: &'static str,
    /// The parameter that takes `next` of the page before.
    pub(super) cursor: &'static str,
}

impl Client {
    pub(super) fn new(common: &Common) -> Result<Self, Failure> {
        let wrong = |why: String| Failure::usage("--url cannot be used", why, "give one such as http://127.0.0.1:8081");
        let base: Url = common.url.parse().map_err(|error| wrong(format!("{error}")))?;
        if !["http", "https"].contains(&base.scheme()) || base.cannot_be_a_base() {
            return Err(wrong("it is no http or https address".to_owned()));
        }
        if !base.username().is_empty() || base.password().is_some() {
            return Err(wrong(
                "it carries a login; the token comes from ADMIN_TOKEN or --token-file".to_owned(),
            ));
        }
        // A proxy or a redirect would be given the token.
        let http = reqwest::Client::builder()
            .timeout(common.timeout)
            .connect_timeout(CONNECT_WITHIN.min(common.timeout))
            .redirect(redirect::Policy::none())
            .no_proxy()
            .build()
            .map_err(|error| Failure::told(Ended::Failed, "no HTTP client", error.to_string(), "report it"))?;
        Ok(Self {
            http,
            base,
            token: token(common)?,
        })
    }

    pub(super) async fn get(&self, path: &[&str], query: &[(&str, String)]) -> Result<Value, Failure> {
        let mut url = self.url(path)?;
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        self.send(self.http.request(Method::GET, url), false).await
    }

    /// `changes`: whether something may be done, which a lost answer would leave open.
    pub(super) async fn post(&self, path: &[&str], body: &impl Serialize, changes: bool) -> Result<Value, Failure> {
        let url = self.url(path)?;
        self.send(self.http.request(Method::POST, url).json(body), changes)
            .await
    }

    /// Hands the items on page by page, at most so many; returns how many, and whether there are more.
    pub(super) async fn each(
        &self,
        listing: Listing<'_>,
        most: Option<u32>,
        mut show: impl FnMut(&[Value]) -> Result<(), Failure>,
    ) -> Result<(u32, bool), Failure> {
        let (mut shown, mut next) = (0, None);
        loop {
            let left = most.map_or(PAGE, |most| (most - shown).min(PAGE));
            let mut query = listing.query.clone();
            query.push(("limit", left.to_string()));
            query.extend(next.map(|next| (listing.cursor, next)));
            let page = self.get(listing.path, &query).await?;
            let items = page[listing.items].as_array().map(Vec::as_slice).unwrap_or_default();
            show(items)?;
            shown += u32::try_from(items.len()).unwrap_or(u32::MAX);
            next = match &page["next"] {
                Value::String(text) => Some(text.clone()),
                Value::Number(number) => Some(number.to_string()),
                _ => return Ok((shown, false)),
            };
            if items.is_empty() || most.is_some_and(|most| shown >= most) {
                return Ok((shown, true));
            }
        }
    }

    fn url(&self, path: &[&str]) -> Result<Url, Failure> {
        let mut url = self.base.clone();
        url.set_query(None);
        url.path_segments_mut()
            .map_err(|()| Failure::usage("--url cannot be used", "it has no path", "give an http address"))?
            .pop_if_empty()
            .extend(path);
        Ok(url)
    }

    async fn send<T: DeserializeOwned>(&self, mut request: RequestBuilder, changes: bool) -> Result<T, Failure> {
        if let Some(token) = &self.token {
            request = request.bearer_auth(token.expose());
        }
        let response = request.send().await.map_err(|error| self.unanswered(&error, changes))?;
        let status = response.status();
        if status.is_success() {
            return response.json().await.map_err(|error| self.unanswered(&error, changes));
        }
        Err(self.problem(response, changes).await)
    }

    async fn problem(&self, response: Response, changes: bool) -> Failure {
        let status = response.status();
        let is_problem = response
            .headers()
            .get(header::CONTENT_TYPE)
            .is_some_and(|kind| kind.as_bytes().starts_with(b"application/problem+json"));
        match response.json::<Problem>().await {
            Ok(problem) if is_problem => Failure::refused(problem, changes),
            _ => Failure::told(
                Ended::Failed,
                format!("{} does not answer like commerce-consumer", self.base),
                format!("HTTP {status} without a problem document"),
                "look at --url: is something else in front of the service?",
            ),
        }
    }

    /// No answer came, or none that can be read.
    fn unanswered(&self, error: &reqwest::Error, changes: bool) -> Failure {
        let causes = causes(error);
        let why = causes.last().cloned().unwrap_or_default();
        let (what, ended) = if error.is_connect() {
            (format!("{} cannot be reached", self.base), Ended::Unreachable)
        } else if error.is_decode() && !error.is_timeout() {
            (format!("the answer of {} cannot be read", self.base), Ended::Failed)
        } else if changes {
            (format!("{} did not answer", self.base), Ended::Failed)
        } else {
            (format!("{} did not answer", self.base), Ended::Unreachable)
        };
        let hint = if ended == Ended::Failed && changes {
            MAY_BE_DONE
        } else {
            "is the service up, and is it there? --url or COMMERCE_ADMIN_URL says where"
        };
        Failure::Told(Box::new(Told {
            ended,
            what,
            why: vec![why],
            hint: hint.to_owned(),
            causes,
            retryable: true,
        }))
    }
}

fn token(common: &Common) -> Result<Option<Secret>, Failure> {
    let text = match &common.token_file {
        Some(file) => Some(std::fs::read_to_string(file).map_err(|error| {
            Failure::usage(
                format!("--token-file {} cannot be read", file.display()),
                error.to_string(),
                "name a file that holds the token alone",
            )
        })?),
        None => std::env::var("ADMIN_TOKEN").ok(),
    };
    let text = text.map(|text| text.trim().to_owned()).filter(|text| !text.is_empty());
    if text
        .as_ref()
        .is_some_and(|text| !text.bytes().all(|byte| byte.is_ascii_graphic()))
    {
        return Err(Failure::usage(
            "the token cannot be sent",
            "it has characters that no HTTP header may carry",
            "name a file that holds the token alone, on one line",
        ));
    }
    Ok(text.map(|text| {
        let Ok(secret) = text.parse();
        secret
    }))
}
