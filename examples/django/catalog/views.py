from django.http import HttpResponse, JsonResponse

from .models import Product


def index(request):
    return HttpResponse("<h1>Hello from Django</h1>")


def products(request):
    return JsonResponse({"products": list(Product.objects.values_list("name", flat=True))})
