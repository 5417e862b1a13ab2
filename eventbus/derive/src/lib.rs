//! `#[derive(Event)]` and `#[derive(Command)]`: wire names and versions, written out by the author.

use proc_macro::TokenStream;
use proc_macro2::{Span, TokenStream as Tokens};
use quote::quote;
use syn::parse::ParseStream;
use syn::{DeriveInput, Expr, Ident, LitInt, LitStr, Path, Token, Type, parse_macro_input};

/// Derives `Event`: `#[event(type = "shop.order.placed", version = 1, key = order_id)]`.
///
/// `type` is the wire name and is required; `version` is required; `key` names a field or is any
/// expression over `self`; `codec` is a type, JSON by default.
#[proc_macro_derive(Event, attributes(event))]
pub fn event(input: TokenStream) -> TokenStream {
    expand(parse_macro_input!(input as DeriveInput), "event").into()
}

/// Derives `Command`: as `Event`, with `reply = Answer` for the type that answers it.
#[proc_macro_derive(Command, attributes(command))]
pub fn command(input: TokenStream) -> TokenStream {
    expand(parse_macro_input!(input as DeriveInput), "command").into()
}

#[derive(Default)]
struct Options {
    wire_name: Option<LitStr>,
    version: Option<LitInt>,
    key: Option<Expr>,
    codec: Option<Path>,
    reply: Option<Type>,
}

impl Options {
    fn parse(&mut self, input: ParseStream<'_>, attribute: &str) -> syn::Result<()> {
        while !input.is_empty() {
            if input.peek(Token![type]) {
                input.parse::<Token![type]>()?;
                input.parse::<Token![=]>()?;
                self.wire_name = Some(input.parse()?);
            } else {
                let name: Ident = input.parse()?;
                input.parse::<Token![=]>()?;
                match name.to_string().as_str() {
                    "version" => self.version = Some(input.parse()?),
                    "key" => self.key = Some(input.parse()?),
                    "codec" => self.codec = Some(input.parse()?),
                    "reply" if attribute == "command" => self.reply = Some(input.parse()?),
                    other => {
                        let text = format!(
                            "unknown option `{other}`; known: type, version, key, codec{}",
                            if attribute == "command" { ", reply" } else { "" }
                        );
                        return Err(syn::Error::new(name.span(), text));
                    }
                }
            }
            if !input.is_empty() {
                input.parse::<Token![,]>()?;
            }
        }
        Ok(())
    }
}

fn expand(input: DeriveInput, attribute: &str) -> Tokens {
    generate(&input, attribute).unwrap_or_else(|error| error.to_compile_error())
}

fn generate(input: &DeriveInput, attribute: &str) -> syn::Result<Tokens> {
    let mut options = Options::default();
    for attr in input.attrs.iter().filter(|attr| attr.path().is_ident(attribute)) {
        attr.parse_args_with(|stream: ParseStream<'_>| options.parse(stream, attribute))?;
    }
    let missing = |what: &str| {
        syn::Error::new(
            Span::call_site(),
            format!(
                "`#[{attribute}({what} = …)]` is missing: wire names and versions are always written out"
            ),
        )
    };
    let wire_name = options.wire_name.ok_or_else(|| missing("type"))?;
    check_wire_name(&wire_name)?;
    let version = options.version.ok_or_else(|| missing("version"))?;
    if version.base10_parse::<u32>()? == 0 {
        return Err(syn::Error::new(version.span(), "versions count from 1"));
    }
    let codec = match options.codec {
        Some(path) => quote!(#path),
        None => quote!(::eventbus::codec::Json),
    };
    let key = match options.key {
        None => quote!(::core::option::Option::None),
        Some(Expr::Path(path)) if path.path.get_ident().is_some_and(|ident| ident != "self") => {
            quote!(::core::option::Option::Some(::eventbus::Key::from(&self.#path)))
        }
        Some(expression) => quote!(::core::option::Option::Some(::eventbus::Key::from(#expression))),
    };
    let is_command = attribute == "command";
    let name = &input.ident;
    let (impl_generics, type_generics, where_clause) = input.generics.split_for_impl();
    let marker = if is_command {
        let reply = options.reply.map_or_else(|| quote!(()), |reply| quote!(#reply));
        quote!(impl #impl_generics ::eventbus::Command for #name #type_generics #where_clause { type Reply = #reply; })
    } else {
        quote!(impl #impl_generics ::eventbus::Event for #name #type_generics #where_clause {})
    };
    Ok(quote! {
        impl #impl_generics ::eventbus::Message for #name #type_generics #where_clause {
            const TYPE: &'static str = #wire_name;
            const VERSION: u32 = #version;
            const IS_COMMAND: bool = #is_command;
            type Codec = #codec;
            fn key(&self) -> ::core::option::Option<::eventbus::Key> { #key }
        }
        #marker
    })
}

fn check_wire_name(name: &LitStr) -> syn::Result<()> {
    let text = name.value();
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/');
    if text.is_empty() || !text.chars().all(plain) {
        return Err(syn::Error::new(
            name.span(),
            "a wire name holds letters, digits, '.', '_', '-' and '/', such as \"shop.order.placed\"",
        ));
    }
    Ok(())
}
