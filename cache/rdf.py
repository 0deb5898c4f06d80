"""The RDF/XML grammar, as far as an entry may use it (W3C RDF 1.1 XML Syntax, section 7).

Only the shape is judged: which elements may nest, carry text or carry attributes. A property whose
children are properties needs `rdf:parseType="Resource"`; without it RDF reads each child as a node.
"""

from lxml import etree

from stratocache.cache.document import RDF, XML, XMLDSIG, spell
from stratocache.cache.errors import NotVerified

_PARSE_TYPE = f"{{{RDF}}}parseType"
_RESOURCE_ATTRIBUTES = {f"{{{RDF}}}resource", f"{{{RDF}}}nodeID"}
_NODE_ATTRIBUTES = {f"{{{RDF}}}{name}" for name in ("about", "ID", "nodeID")}
_SYNTAX_TERMS = {"RDF", "ID", "about", "parseType", "resource", "nodeID", "datatype"}
_OLD_TERMS = {"aboutEach", "aboutEachPrefix", "bagID"}
_NEVER_NODES = {f"{{{RDF}}}{name}" for name in _SYNTAX_TERMS | _OLD_TERMS | {"li"}}
_NEVER_PROPERTIES = {f"{{{RDF}}}{name}" for name in _SYNTAX_TERMS | _OLD_TERMS | {"Description"}}


def check_node(element: etree._Element) -> None:
    """Check a node element and everything below it; raises `NotVerified`, `document-invalid`."""
    if element.tag in _NEVER_NODES:
        raise fault(element, f"{spell(element)} cannot be a node")
    if len(_NODE_ATTRIBUTES & set(map(str, element.attrib))) > 1:
        raise fault(element, f"{spell(element)} has more than one of rdf:about, ID and nodeID")
    _check_properties(element)


def fault(element: etree._Element, reason: str) -> NotVerified:
    """Make the error that names an element, its line and what is wrong with it."""
    line = f"line {element.sourceline}: " if element.sourceline else ""
    return NotVerified("document-invalid", f"{line}{reason}.", field=spell(element))


def _check_properties(parent: etree._Element) -> None:
    """Check the content of a node, or of a property with `parseType="Resource"`."""
    _refuse_text(parent)
    for child in parent.iterchildren("*"):
        # A signature in the wrong place has an error of its own, from who verifies it.
        if etree.QName(child).namespace != XMLDSIG:
            _check_property(child)


def _check_property(element: etree._Element) -> None:
    name = spell(element)
    if element.tag in _NEVER_PROPERTIES:
        raise fault(element, f"{name} is not a property")
    match element.get(_PARSE_TYPE):
        case "Resource":
            _refuse_attributes(element)
            _check_properties(element)
        case "Collection":
            _refuse_attributes(element)
            _refuse_text(element)
            for child in element.iterchildren("*"):
                check_node(child)
        case "Literal":
            _refuse_attributes(element)
        case None:
            _check_plain_property(element)
        case other:
            raise fault(element, f'rdf:parseType of {name} is "{other}"; it must be "Resource"')


def _check_plain_property(element: etree._Element) -> None:
    name, children = spell(element), list(element.iterchildren("*"))
    if not children:
        if (element.text or "").strip() and _RESOURCE_ATTRIBUTES & set(map(str, element.attrib)):
            raise fault(element, f"{name} has both a text and an rdf:resource")
        return
    if len(children) > 1:
        raise fault(element, f'{name} has elements inside it but no rdf:parseType="Resource"')
    _refuse_text(element)
    try:
        check_node(children[0])
    except NotVerified as error:
        raise fault(
            element,
            f'{name} has no rdf:parseType="Resource", and what it holds is not a node '
            f"({error.message.rstrip('.')})",
        ) from None


def _refuse_text(element: etree._Element) -> None:
    text = (element.text or "") + "".join(child.tail or "" for child in element)
    if text.strip():
        raise fault(element, f'{spell(element)} has text "{text.strip()[:40]}" among its elements')


def _refuse_attributes(element: etree._Element) -> None:
    for attribute in map(str, element.attrib):
        if attribute not in (_PARSE_TYPE, f"{{{RDF}}}ID") and not attribute.startswith(
            f"{{{XML}}}"
        ):
            raise fault(
                element, f"{spell(element)} has rdf:parseType, so {spell(attribute)} cannot be"
            )
