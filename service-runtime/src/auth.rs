use std::{fmt, str::FromStr, sync::Arc};

use axum::http::{HeaderMap, header};
use clap::Args;

use crate::{
    problem::{FORBIDDEN, Problem, UNAUTHENTICATED},
    settings::Secret,
};

#[derive(Debug, Clone, Args)]
pub struct AuthSettings {
    /// Who may change things through `/admin`, as `NAME:ROLE:TOKEN`, several separated by commas; roles are `viewer`,
    /// `operator` and `admin`, tokens have 16 characters or more. Without any, nothing can be changed there.
    #[arg(long, env = "ADMIN_TOKENS", value_delimiter = ',', hide_env_values = true)]
    pub admin_tokens: Vec<Secret>,
}

/// The tokens in force. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Grants(Arc<[Grant]>);

impl AuthSettings {
    /// # Errors
    /// Says which of the tokens is wrong, by its place, and never prints it.
    pub fn grants(&self) -> Result<Grants, GrantsError> {
        // A compose file passes on a variable that is not set as an empty one.
        if let [only] = &self.admin_tokens[..]
            && only.expose().is_empty()
        {
            return Ok(Grants::default());
        }
        let grants = self.admin_tokens.iter().enumerate().map(|(index, text)| {
            text.expose().parse().map_err(|error| GrantsError {
                place: index + 1,
                error,
            })
        });
        Ok(Grants(grants.collect::<Result<_, _>>()?))
    }
}

#[derive(Debug, thiserror::Error)]
#[error("ADMIN_TOKENS: number {place} {error}")]
pub struct GrantsError {
    place: usize,
    error: GrantError,
}

/// Each role may do what those before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    Viewer,
    Operator,
    Admin,
}

impl Role {
    pub fn name(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// A token, who has it, and what it allows.
#[derive(Debug, Clone)]
struct Grant {
    name: String,
    role: Role,
    token: Secret,
}

#[derive(Debug, thiserror::Error)]
enum GrantError {
    #[error("is not NAME:ROLE:TOKEN")]
    Parts,
    #[error("has a role that is not one of viewer, operator, admin")]
    Role,
    #[error("has a token of less than 16 characters")]
    Short,
}

/// Short tokens can be guessed.
const MIN_TOKEN: usize = 16;

impl FromStr for Grant {
    type Err = GrantError;

    fn from_str(text: &str) -> Result<Self, GrantError> {
        let mut parts = text.splitn(3, ':');
        let (Some(name), Some(role), Some(token)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(GrantError::Parts);
        };
        if name.is_empty() {
            return Err(GrantError::Parts);
        }
        let role = [Role::Viewer, Role::Operator, Role::Admin]
            .into_iter()
            .find(|known| known.name() == role)
            .ok_or(GrantError::Role)?;
        if token.len() < MIN_TOKEN {
            return Err(GrantError::Short);
        }
        let Ok(token) = token.parse();
        Ok(Self {
            name: name.to_owned(),
            role,
            token,
        })
    }
}

/// Whose request it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    pub name: String,
    pub role: Role,
}

impl Grants {
    /// The caller, who must have `role` or more.
    ///
    /// # Errors
    /// 401 without a known token, 403 with too little a role.
    pub fn require(&self, headers: &HeaderMap, role: Role) -> Result<Caller, Problem> {
        let given = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.strip_prefix("Bearer "));
        let Some(given) = given else {
            return Err(Problem::new(
                &UNAUTHENTICATED,
                format!("this needs a bearer token with the role {role}"),
            ));
        };
        // All of them, so that the time does not tell which one came close.
        let mut found = None;
        for grant in self.0.iter() {
            if is_equal(grant.token.expose().as_bytes(), given.as_bytes()) {
                found = Some(grant);
            }
        }
        match found {
            None => Err(Problem::new(&UNAUTHENTICATED, "the token is not known")),
            Some(grant) if grant.role < role => Err(Problem::new(
                &FORBIDDEN,
                format!(
                    "this needs the role {role}, the token of {} has {}",
                    grant.name, grant.role
                ),
            )),
            Some(grant) => Ok(Caller {
                name: grant.name.clone(),
                role: grant.role,
            }),
        }
    }
}

/// In a time that depends on the lengths alone.
fn is_equal(left: &[u8], right: &[u8]) -> bool {
    let difference = left
        .iter()
        .zip(right)
        .fold(0, |sum, (left, right)| sum | (left ^ right));
    left.len() == right.len() && std::hint::black_box(difference) == 0
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderMap, StatusCode, header};

    use super::{AuthSettings, Grants, GrantsError, Role};

    fn grants(tokens: &[&str]) -> Result<Grants, GrantsError> {
        let admin_tokens = tokens.iter().map(|token| token.parse().unwrap()).collect();
        AuthSettings { admin_tokens }.grants()
    }

    fn bearer(token: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, format!("Bearer {token}").parse().unwrap());
        headers
    }

    #[test]
    fn a_token_allows_what_its_role_does() {
        let settings = grants(&["ann:viewer:aaaaaaaaaaaaaaaa", "bob:operator:bbbbbbbb:bbbbbbbb"]).unwrap();
        let caller = settings.require(&bearer("bbbbbbbb:bbbbbbbb"), Role::Operator).unwrap();
        assert_eq!((caller.name.as_str(), caller.role), ("bob", Role::Operator));
        settings.require(&bearer("bbbbbbbb:bbbbbbbb"), Role::Viewer).unwrap();

        let refused = |headers: &HeaderMap| settings.require(headers, Role::Operator).unwrap_err().status;
        assert_eq!(refused(&bearer("aaaaaaaaaaaaaaaa")), StatusCode::FORBIDDEN.as_u16());
        assert_eq!(refused(&bearer("aaaaaaaaaaaaaaa")), StatusCode::UNAUTHORIZED.as_u16());
        assert_eq!(refused(&bearer("aaaaaaaaaaaaaaab")), StatusCode::UNAUTHORIZED.as_u16());
        assert_eq!(refused(&HeaderMap::new()), StatusCode::UNAUTHORIZED.as_u16());
    }

    #[test]
    fn an_empty_variable_is_none_and_gives_nobody_a_token() {
        let settings = grants(&[""]).unwrap();
        assert!(settings.require(&bearer(""), Role::Viewer).is_err());
        assert!(grants(&["ann:viewer:aaaaaaaaaaaaaaaa", ""]).is_err());
    }

    #[test]
    fn a_grant_that_is_wrong_is_refused_without_its_token() {
        for (text, told) in [
            ("ann:viewer", "NAME:ROLE:TOKEN"),
            (":viewer:aaaaaaaaaaaaaaaa", "NAME:ROLE:TOKEN"),
            ("ann:king:aaaaaaaaaaaaaaaa", "not one of viewer, operator, admin"),
            ("ann:viewer:secret", "less than 16"),
        ] {
            let error = grants(&["ann:viewer:aaaaaaaaaaaaaaaa", text]).unwrap_err().to_string();
            assert!(error.contains(told) && error.contains("number 2"), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }
}
