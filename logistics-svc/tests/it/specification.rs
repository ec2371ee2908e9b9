use std::collections::HashSet;

use axum::{
    body::Body,
    http::{Method, StatusCode},
};

use crate::service::{TestService, request};

#[tokio::test]
async fn router_and_specification_agree() {
    let service = TestService::start().await;
    let specification = service.get("/openapi.json").await.expect(200);
    let paths = specification["paths"].as_object().unwrap();
    let mut operations = HashSet::new();
    for (path, item) in paths {
        let concrete = path.replace("{id}", "1");
        for method in ["get", "post", "put", "patch", "delete"] {
            let http_method = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
            let answer = service.send(request(http_method, &concrete, &[], Body::empty())).await;
            let Some(operation) = item.get(method) else {
                let expected = StatusCode::METHOD_NOT_ALLOWED;
                assert_eq!(answer.status, expected, "{method} {path} is not in the specification");
                continue;
            };
            assert_ne!(answer.status, StatusCode::METHOD_NOT_ALLOWED, "{method} {path}");
            assert_ne!(answer.json()["code"], "not-found", "{method} {path}");
            let responses = operation["responses"].as_object().unwrap();
            for (status, response) in responses {
                let described = response["description"].as_str().is_some_and(|text| !text.is_empty());
                assert!(described, "{method} {path} {status} has no description");
            }
            let status = answer.status.as_str();
            assert!(
                responses.contains_key(status),
                "{method} {path} answered {status}, not in the specification"
            );
            assert!(
                responses.keys().any(|status| status.starts_with('2')),
                "{method} {path}"
            );
            assert!(
                responses["503"]["content"]["application/problem+json"].is_object(),
                "{method} {path} has no problem"
            );
            let id = operation["operationId"].as_str().unwrap().to_owned();
            assert!(operations.insert(id), "{method} {path}: its id occurs twice");
            if method == "post" {
                let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
                assert!(schema.is_object(), "{method} {path} has no body");
                let takes_key = operation["parameters"].to_string().contains("Idempotency-Key");
                // An operator's request is not carried out twice while it is open.
                assert!(takes_key || path.starts_with("/admin/"), "{method} {path}");
            }
        }
    }
    assert_eq!(operations.len(), 21);
    let text = specification.to_string();
    for reference in text.split("\"#/components/schemas/").skip(1) {
        let name = reference.split('"').next().unwrap();
        let known = specification["components"]["schemas"][name].is_object();
        assert!(known, "schema {name} is used and not defined");
    }
}

#[tokio::test]
async fn every_problem_code_is_explained() {
    let service = TestService::start().await;
    for kind in logistics_svc::http::error::KINDS {
        let answer = service.get(&format!("/problems/{}", kind.code)).await;
        assert_eq!(answer.status, StatusCode::OK);
        assert!(answer.text.contains(kind.help));
    }
}
